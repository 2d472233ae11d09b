"""A process of its own for each run of an engine: what one leaves behind in memory is not another's gain."""

from __future__ import annotations

import os
import pickle
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fednorm.bench.case import Case
from fednorm.bench.meter import Cost
from fednorm.errors import FedNormError


def alone(engine: Callable[[Case], Cost], case: Case) -> Cost:
    """Return what a run of an engine costs in a process that is forked for it; in this one where that is not safe.

    Raises:
        FedNormError: As the engine does; or the process has died.
    """
    if sys.platform != "linux":
        return engine(case)
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, none of which is used there
        pid = os.fork()  # by itself: pfl does not run where Python's multiprocessing has started a process
    if pid == 0:
        os.close(reader)
        _answer(engine, case, writer)
    os.close(writer)
    with open(reader, "rb") as pipe:
        said = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if not said:
        raise FedNormError(f"The process in which the case {case.name} was run ended with exit code {code}.")
    answer = pickle.loads(said)
    if isinstance(answer, BaseException):
        raise answer
    run: Cost
    run, arrays = answer
    return replace(run, tensors={key: torch.from_numpy(array) for key, array in arrays.items()})


def _answer(engine: Callable[[Case], Cost], case: Case, writer: int) -> None:
    """Run the engine in the process that was forked, write what comes of it, and end the process."""
    try:
        answer: Any
        try:
            run = engine(case)
            # As arrays: tensors would go through files that end with this process.
            arrays = {key: tensor.cpu().contiguous().numpy() for key, tensor in run.tensors.items()}
            answer = replace(run, tensors={}), arrays
        except BaseException as error:
            answer = error
        with open(writer, "wb") as pipe:
            pickle.dump(answer, pipe)
    finally:
        os._exit(0)
