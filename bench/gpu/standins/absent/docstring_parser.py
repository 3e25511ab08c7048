raise ModuleNotFoundError("docstring_parser is not there where the GPU is", name="docstring_parser")
