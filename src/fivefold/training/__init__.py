"""Training: the one loop in which weights are fitted, whatever a technique chose to fit.

What lives here: the loop and the teacher-student loss. What may not live here: techniques, engines, meters, recipes. A
technique says which parameters, which loss and which `TrainPlan`; the loop knows nothing else.
"""
