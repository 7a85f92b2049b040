"""A Ray cluster of local nodes, and the replicas that run there."""

import contextlib
import os

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_worker_niceness"] = "0"  # by default, everything else on a busy machine comes first
os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "300"  # on slow machines too

import ray
from ray import serve
from ray.cluster_utils import Cluster

NODE = {"num_cpus": 2, "object_store_memory": 100 << 20, "include_dashboard": False}


@contextlib.contextmanager
def local_cluster(nodes):
    """Connect to a new cluster of so many local nodes; yields it. All its processes have ended afterwards."""
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    try:
        for _ in range(nodes - 1):
            cluster.add_node(**NODE)
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
    finally:
        with contextlib.suppress(Exception):
            serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


def replicas(word):
    """Names of the replicas whose deployment has this word in its name."""
    names = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True)]
    return sorted(name for name in names if name.startswith("SERVE_REPLICA::") and word in name)


def kill(name):
    """Kill a replica, as a crash does."""
    ray.kill(ray.get_actor(name, namespace="serve"), no_restart=True)


def node_of(name):
    """The id of the node of a replica."""
    states = ray._private.state.actors()
    return next(one["Address"]["NodeID"] for one in states.values() if one["Name"] == name and one["State"] == "ALIVE")
