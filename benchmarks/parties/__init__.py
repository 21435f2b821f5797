"""The programs that take turns, but for fairseq-train.

    python -m parties.masked_lm ours|fairseq_model|transformers CONFIG_JSON STEPS

Each trains on without end, and after every STEPS steps prints ``{"tokens": ..}``: those of the interval.
"""
