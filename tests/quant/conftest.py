import torch

torch.set_num_threads(1)  # on a busy machine, threads that wait for one another make tiny tensors many times slower
