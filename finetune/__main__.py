"""`python -m finetune`, for launchers that start modules."""

from finetune.cli import app

if __name__ == "__main__":
    app()
