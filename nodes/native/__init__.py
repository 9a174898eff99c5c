"""Networks, sockets and helpers behind the nodes, in the terms of ComfyUI."""
