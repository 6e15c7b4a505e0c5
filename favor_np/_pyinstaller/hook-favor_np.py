"""What a frozen program needs that no import statement names."""

from PyInstaller.utils.hooks import collect_data_files, collect_submodules


def _wanted(name: str) -> bool:
    """Frameworks come with the programs that import a bridge to them."""
    return not name.startswith(("favor_np._pyinstaller", "favor_np.cuda", "favor_np.interop"))


datas = collect_data_files("favor_np", includes=["forecast/data/*.csv"])
hiddenimports = collect_submodules("favor_np", filter=_wanted)
