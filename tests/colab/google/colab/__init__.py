"""A stand-in for the package of Colab's runtimes, for tests: FAKE_SECRET and FAKE_DRIVE say how it behaves.

It has the names, signatures and exceptions of googlecolab/colabtools that this project uses, and asks nobody anything."""
