"""A conversation in the terminal: what was said, who answers, and the loop between both.

Decisions:
- A model is spoken to in the format that its own chat template gives; where there is none, that is an error and no guess.
- What was said is kept whole; what no longer fits the model's context is left out of what it is shown, the oldest turns first, and
  that is told once.
- A turn that got no answer (an error, an interrupt before the first word) is no turn.
"""
