"""What `probe` asks hosts, and what their answers mean: facts.sh asks, each module here parses some of the answers.

All of it is pure: an `Answer` in, frozen dataclasses out. What a host does not say is None, never a guess.
"""
