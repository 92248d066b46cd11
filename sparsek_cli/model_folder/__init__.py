"""What lies at the path that a user calls a model, told from names and headers alone.

Every verb's MODEL passes here (hub.resolve): what can be read goes on, anything else is refused in
one line that says what it is and what to do. Tensors are not loaded.

check        all of a folder
config_file  config.json, read and looked at
side_files   the small files beside it
templates    chat templates that are given more than once
weights      which files hold the weights
not_a_model  what a path without a model is instead
short_names  names that people type instead of hub ids
"""

from sparsek_cli.model_folder.check import check
from sparsek_cli.model_folder.config_file import read_config
from sparsek_cli.model_folder.not_a_model import file_error
from sparsek_cli.model_folder.side_files import check_special
from sparsek_cli.model_folder.templates import told_apart

__all__ = ["check", "check_special", "file_error", "read_config", "told_apart"]
