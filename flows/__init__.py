"""The shell: Prefect flows, the feed, the registry and the command line."""
