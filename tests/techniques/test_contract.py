"""Every technique of the catalogue keeps the contract; a new file is tested the moment it exists."""

from fivefold.testing.contract import TechniqueContract


class TestCatalogue(TechniqueContract):
    pass
