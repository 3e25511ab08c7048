raise ModuleNotFoundError("shtab is not there where the GPU is", name="shtab")
