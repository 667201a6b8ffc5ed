"""The classes of new texts by a fine-tuned run: python scripts/classify.py RUN "text" ..."""

from jaxgpt.cli.main import script

if __name__ == "__main__":
    script("classify")
