"""One Prefect flow per stage. Each calls the task of the same name in `tasks/stages/`."""
