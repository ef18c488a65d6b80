"""One MoE layer, from E experts to N: measure it, propose candidates, fit them, judge them, write the best."""
