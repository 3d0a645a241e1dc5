"""The command `launch`: a stage or a pipeline on this machine, on a list of machines, on Slurm or on Kubernetes."""

import argparse
from dataclasses import replace


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add the parser of `launch`."""
    text = "start a stage or a pipeline on one machine or many, and again after a crash"
    parser = commands.add_parser("launch", help=text, description=text)
    parser.add_argument("file", metavar="F", help="a stage's config (with `stage: NAME`) or a pipeline: path or name")
    parser.add_argument("--on", required=True, choices=["local", "hostfile", "slurm", "k8s"], help="what starts it")
    parser.add_argument("--cluster", metavar="C", help="a YAML about the cluster, or the name of a packaged one")
    parser.add_argument("--nodes", type=int, help="machines (cluster.nodes)")
    parser.add_argument("--nproc", type=int, help="processes a machine (cluster.nproc)")
    parser.add_argument("--hostfile", metavar="H", help="`HOST slots=N` a line, for --on hostfile (cluster.hostfile)")
    parser.add_argument("--no_ssh", "--no-ssh", action="store_true", help="started on every machine of H by itself")
    parser.add_argument("--node_rank", "--node-rank", type=int, help="with --no_ssh: which machine this is, from 0")
    parser.add_argument("--max-restarts", type=int, default=3, metavar="N", help="after crashes in a row, 3 by default")
    parser.add_argument("--dry-run", action="store_true", help="print what would run or be submitted, and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of F; those of C as cluster.key=value")
    parser.set_defaults(action=launch)


def launch(arguments: argparse.Namespace) -> int:
    """Describe the job once, then let the launcher print or start it."""
    from ..launchers import kubernetes, local, slurm
    from ..launchers.cluster import PREFIX, load_cluster
    from ..launchers.jobs import shown, step_jobs, whole_job

    if arguments.no_ssh != (arguments.node_rank is not None):
        raise ValueError("--no_ssh and --node_rank R go together: which machine of the host file is this?")
    if arguments.no_ssh and arguments.on != "hostfile":
        raise ValueError(f"--no_ssh is for --on hostfile, not {arguments.on}")
    options = {name: getattr(arguments, name) for name in ("nodes", "nproc", "hostfile")}
    settings = [f"{PREFIX}{name}={value}" for name, value in options.items() if value is not None]
    cluster, overrides = load_cluster(arguments.cluster, overrides=[*arguments.overrides, *settings])
    restarts = arguments.max_restarts
    if arguments.on in ("local", "hostfile"):
        if arguments.on == "local":
            placement = local.local_placement(cluster)
        else:
            placement = local.hostfile_placement(cluster, node_rank=arguments.node_rank)
        cluster = replace(cluster, nproc=placement.slots)  # a host file says it itself
        job = whole_job(arguments.file, overrides=overrides, cluster=cluster)
        if arguments.dry_run:
            print(local.render(job, placement), end="")
            return 0
        return local.start(job, placement, max_restarts=restarts)
    jobs = step_jobs(arguments.file, overrides=overrides, cluster=cluster)
    if arguments.on == "slurm":
        if arguments.dry_run:
            for job in jobs:
                after = f"NUMBER_OF_{job.after}" if job.after else ""
                print(f"# {shown(slurm.submit_command(job, after=after))}")
                print(slurm.render(job, cluster, max_restarts=restarts))
            return 0
        for name, number in slurm.submit(jobs, cluster, max_restarts=restarts).items():
            print(f"{name}\tjob {number}\t{jobs[0].logs}/slurm_{name}_{number}.log")
        return 0
    name = jobs[0].run_dir.name
    manifest = kubernetes.render(jobs, cluster, name=name, max_restarts=restarts)
    file = jobs[0].run_dir / "launch" / f"{name}.yaml"
    if arguments.dry_run:
        print(f"# {shown(kubernetes.create_command(file))}\n{manifest}", end="")
        return 0
    return kubernetes.create(manifest, file)
