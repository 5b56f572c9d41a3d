"""Write files whole or not at all, so that a kill or a crash never leaves half a file."""

from timm_autoslim.utils.files import replace_file as replace_file
from timm_autoslim.utils.files import sync_to_disk as sync_to_disk
from timm_autoslim.utils.files import write_text as write_text
