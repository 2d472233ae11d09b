"""The data: domains read once into shared arrays, and the clients that hold rows of them."""

from fednorm.cards import DATA
from fednorm.data.benchmarks import Benchmark
from fednorm.data.domain import Client, Domain, Federation, Split, pixels
from fednorm.data.federation import load_federation

__all__ = ["DATA", "Benchmark", "Client", "Domain", "Federation", "Split", "load_federation", "pixels"]
