"""Supervised fine-tuning: make a better model and judge it. Knows neither Prefect nor MLflow."""
