def rule_reward(row, answer, form="em_f1"):
    gold = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    right = answer is not None and answer.strip() in gold
    return float(right), right
