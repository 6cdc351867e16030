"""What every test below shares: the fixtures of the harness."""

pytest_plugins = ["kvmlab.plugin"]
