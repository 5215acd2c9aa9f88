import time
def test_x(small_world):
    t=time.time()
    w=small_world("handwriting"); print("boot",time.time()-t)
    from flows.watch import watch
    from flows.registry import Registry
    w.arrive(0,1,labelled=True)
    r=watch(str(w.path)); print("watch",time.time()-t); print(r)
    reg=Registry(w.settings)
    for v in reg.versions(): print(v)
    import shutil; shutil.rmtree("/tmp/world",ignore_errors=True); shutil.copytree(w.path.parent,"/tmp/world"); print(w.path)
