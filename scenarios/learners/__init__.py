"""Learners: one file each, an Avalanche training template.

from scenarios.learners.er_ace import ERACE
learner = ERACE(model=model, optimizer=optimizer, num_classes=10, train_mb_size=10, seed=1)
for experience in to_avalanche(stream).train_stream:
    learner.train(experience)
"""

from __future__ import annotations
