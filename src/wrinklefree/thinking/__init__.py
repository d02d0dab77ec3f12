"""The stages of a thinker (`methods/trm.py`): compressor, thoughts, recursion, speech, reinforcement, evaluation."""
