"""Continue a prompt with a trained run: python scripts/generate.py RUN --prompt "ROMEO:" """

from jaxgpt.cli.main import script

if __name__ == "__main__":
    script("generate")
