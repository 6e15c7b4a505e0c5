"""Start-up, each in a process of its own. The first call finds a warm cache where there is one."""


class Startup:
    number = 1
    repeat = (2, 5, 20.0)

    def timeraw_import_numpy(self):
        return "import numpy"

    def timeraw_import(self):
        return "import favor_np"

    def timeraw_first_call(self):
        return """
        import numpy as np
        import favor_np
        x = np.ones((64, 32), np.float32)
        fm = favor_np.feature_map("positive", dim=32, num_features=32)
        favor_np.favor_attention(x, x, x, fm, causal=True)
        """
