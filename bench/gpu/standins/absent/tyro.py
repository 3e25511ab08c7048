raise ModuleNotFoundError("tyro is not there where the GPU is", name="tyro")
