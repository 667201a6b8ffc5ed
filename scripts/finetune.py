"""Fine-tune a trained run to classify texts: python scripts/finetune.py RUN --dataset ag_news"""

from jaxgpt.cli.main import script

if __name__ == "__main__":
    script("finetune")
