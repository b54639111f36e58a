"""What a run did, for people: terminal table, one-file HTML report, model card, curves.

Everything here reads the plain records of `facts` and nothing else: no model, no directory, no network.
"""
