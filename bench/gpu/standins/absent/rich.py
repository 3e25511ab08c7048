raise ModuleNotFoundError("rich is not there where the GPU is", name="rich")
