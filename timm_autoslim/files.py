"""Files that are written whole or not at all: `timm_autoslim.utils.files`, public."""

from timm_autoslim.utils.files import replace_file as replace_file
from timm_autoslim.utils.files import sync_to_disk as sync_to_disk
from timm_autoslim.utils.files import write_text as write_text
