"""Training: data, base models, adapters and the loop.

Every random draw of a run is a function of its seed, a purpose and indices such as step and
sample (:mod:`lycotool.training.randomness`), never of what was drawn before it.
"""
