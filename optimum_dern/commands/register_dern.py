from optimum_dern.commands.optimum_cli import DernCommand


REGISTER_COMMANDS = [DernCommand]
