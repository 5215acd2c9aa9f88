"""Has the data changed, does it hurt, should we act? Knows neither Prefect nor MLflow."""
