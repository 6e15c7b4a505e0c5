"""CUDA kernels: plain functions made for a feature map's kind; `favor_np.cuda.launch` compiles them."""
