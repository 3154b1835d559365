"""What stands for pytest-benchmark's fixture where cases of the benches are called by hand."""


class Pedantic:
    """Its order of calls."""

    group = ""

    def pedantic(self, target, args, setup, rounds, iterations):
        for _ in range(rounds):
            setup()
            target(*args)
