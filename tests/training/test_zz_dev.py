
import json
def test_dev(tiny_config, tiny_trainer):
    g = json.load(open("tests/training/golden_losses.json"))["steps"]
    tr, it = tiny_trainer(tiny_config())
    dev=[]
    for s in g:
        tr.reset_statistics(); tr.iteration(*next(it)); st=tr.statistics()
        dev.append(max(abs(st[k]/v-1) for k,v in s.items()))
    print("DEV", ["%.1e"%d for d in dev])
