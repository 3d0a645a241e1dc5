"""A folder of this user's alone, in a place where anybody may make folders: a system's temporary one.

Its name can be foreseen, as all processes of a node are to find it, so another user may have taken it first: with a
folder, and then own whatever is put into it, or with a link to elsewhere. Such a one is refused. In a temporary folder
with the usual sticky bit nobody can put another in the place of ours.
"""

import contextlib
import os
import stat
from pathlib import Path


def make_private(folder: Path) -> None:
    """Make `folder` where it is missing, and close it to others; ValueError where it is not this user's."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    require_private(folder)
    if folder.stat().st_mode & 0o077:  # made by an earlier version, or under another umask
        folder.chmod(0o700)


def require_private(folder: Path) -> None:
    """Raise ValueError where `folder` is there and is a link, or somebody else's."""
    try:
        found = folder.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ValueError(
            f"{folder} is a link, or belongs to user {found.st_uid} and not to you ({os.getuid()}): what is in it may "
            "be anybody's. Set remote.cache_dir to a folder of yours, or have that one removed"
        )
