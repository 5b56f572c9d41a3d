"""The recipes: train a supernet, search it, fine-tune the networks, and all of that with one command.

Each recipe is a script: `python recipes/run.py` in the repository, `python -m timm_autoslim all` anywhere.
"""
