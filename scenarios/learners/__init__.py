"""Learners: one file each, in plain PyTorch, and an Avalanche strategy of each for Avalanche's users.

from scenarios.learners.er_ace import ERACELearner
learner = ERACELearner(model=model, optimizer=optimizer, num_classes=10, train_mb_size=10, seed=1)
for experience in stream:
    learner.train(experience)

from scenarios.learners.er_ace import ERACE
learner = ERACE(model=model, optimizer=optimizer, num_classes=10, train_mb_size=10, seed=1, plugins=[...])
for experience in fednorm.avalanche.to_avalanche(stream).train_stream:
    learner.train(experience)
"""

from __future__ import annotations
