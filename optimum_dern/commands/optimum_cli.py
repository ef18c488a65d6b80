"""The commands of `optimum-dern` as command classes of optimum, for `optimum-cli dern ...`.

The installed package has a copy of this file where optimum looks for commands, hence the absolute import.
"""

from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from optimum_dern.commands.main import COMMANDS, add_command, run_safely


__all__ = ["REGISTER_COMMANDS", "DernCommand"]


def _command_class(name: str) -> type[BaseOptimumCLICommand]:
    module = COMMANDS[name]

    class Command(BaseOptimumCLICommand):
        COMMAND = CommandInfo(name=name, help=module.HELP)

        @staticmethod
        def parse_args(parser: ArgumentParser) -> None:
            add_command(parser, module)

        def run(self) -> None:
            run_safely(module.run, self.args)

    Command.__name__ = Command.__qualname__ = f"{name.title()}Command"
    return Command


class DernCommand(BaseOptimumCLICommand):
    """The `optimum-cli dern` command, with the subcommands of `optimum-dern`."""

    COMMAND = CommandInfo(name="dern", help="Make Mixture-of-Experts models smaller without training.")
    SUBCOMMANDS = tuple(
        CommandInfo(name, m.HELP, subcommand_class=_command_class(name)) for name, m in COMMANDS.items()
    )


REGISTER_COMMANDS = [DernCommand]
