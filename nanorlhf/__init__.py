"""nanorlhf: from text to PPO, from scratch.

Start with README.md; the heart is batching.py, losses.py and ppo.py.
"""
__version__ = "0.1.0"
