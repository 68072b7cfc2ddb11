"""Released PyTorch files to an Orbax checkpoint: `python convert_weights.py minigpt4 --vit FILE ... --out DIR`."""

from mmjax import cli

if __name__ == "__main__":
    cli.main("convert")
