"""Trains as a config file says: `python train.py --config configs/tiny_minigpt4.py [--optim.init-lr 1e-3 ...]`."""

from mmjax import cli

if __name__ == "__main__":
    cli.main("train")
