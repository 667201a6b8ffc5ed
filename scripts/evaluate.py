"""Loss and perplexity of a run over a whole split: python scripts/evaluate.py RUN"""

from jaxgpt.cli.main import script

if __name__ == "__main__":
    script("evaluate")
