"""``python -m train_then_compress`` is the command ``ttc``."""

from train_then_compress.cli import app

if __name__ == "__main__":
    app(prog_name="ttc")
