#!/usr/bin/env bash
# Brings up a real Slurm with two nodes on this one machine:
#
#     up.sh [STATE_DIR]; . STATE_DIR/env.sh; srun --nodes 2 --ntasks-per-node 1 hostname; down.sh STATE_DIR
#
# A node is a slurmd in a network and a UTS namespace of its own: its own address and host name, real TCP between
# nodes. The controller and the bridge lie in a namespace too, so that nothing of the machine's own network is touched,
# and several clusters can be up at once. No systemd, cgroups or accounting. Needs root and Debian's slurmctld, slurmd,
# slurm-client, munge, iproute2 and procps. Without STATE_DIR it makes one; the last line says which.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
D=$(realpath "${1:-$(mktemp -d)}")
nodes=2
net=10.77.0 # seen by the namespaces alone
P=slurm$$   # what the names of our namespaces begin with

if [ -e "$D/namespaces" ]; then
    echo "error: $D holds a cluster already: down.sh $D" >&2
    exit 2
fi
# shellcheck disable=SC2317,SC2329 # called by the trap
undo() {
    tail -n 20 "$D"/log/* >&2
    "$here/down.sh" "$D"
}
trap undo EXIT
mkdir -p "$D"/{bin,log,munge,run,spool,state}
chmod 755 "$D" "$D/munge" # munge refuses a socket below a folder that others may not enter

# --- names, and how to run a command as on the host NAME (ctl, node1, node2)
{
    echo "127.0.0.1 localhost"
    echo "$net.1 ctl"
    for i in $(seq $nodes); do echo "$net.$((10 + i)) node$i"; done
} >"$D/hosts"
cat >"$D/bin/on" <<END
#!/bin/sh
# on NAME COMMAND...
name=\$1
shift
exec nsenter --net=/run/netns/$P-\$name unshare --mount --uts \
    sh -c 'mount --bind $D/hosts /etc/hosts; hostname "\$0"; exec "\$@"' "\$name" "\$@"
END
for command in srun sbatch scontrol squeue sinfo scancel; do # as on a login node; a job's own calls stay where they are
    cat >"$D/bin/$command" <<END
#!/bin/sh
export SLURM_CONF=$D/slurm.conf
case "\$(ip netns identify \$\$)" in
$P-*) exec /usr/bin/$command "\$@" ;;
*) exec $D/bin/on ctl /usr/bin/$command "\$@" ;;
esac
END
done
chmod 755 "$D"/bin/*
echo "export SLURM_CONF=$D/slurm.conf PATH=$D/bin:\$PATH" >"$D/env.sh"

# --- network: a bridge in the controller's namespace, a cable to each node
add() { # NAME
    echo "$P-$1" >>"$D/namespaces"
    ip netns add "$P-$1"
    ip -n "$P-$1" link set lo up
}
add ctl
ip -n "$P-ctl" link add br0 type bridge
ip -n "$P-ctl" addr add "$net.1/24" dev br0
ip -n "$P-ctl" link set br0 up
for i in $(seq $nodes); do
    add "node$i"
    ip -n "$P-ctl" link add "v$i" type veth peer name eth0 netns "$P-node$i"
    ip -n "$P-ctl" link set "v$i" master br0 up
    ip -n "$P-node$i" addr add "$net.$((10 + i))/24" dev eth0
    ip -n "$P-node$i" link set eth0 up
done

# --- munge with its own key and socket: one that the machine runs is left alone
head -c 1024 /dev/urandom >"$D/munge/key"
chmod 400 "$D/munge/key"
munged --force --key-file="$D/munge/key" --socket="$D/munge/socket" --pid-file="$D/munge/pid" \
    --log-file="$D/log/munged.log" --seed-file="$D/munge/seed" --origin=127.0.0.1

# --- Slurm
echo "CgroupPlugin=cgroup/v1" >"$D/cgroup.conf" # slurmd loads one even if nothing uses it; v1 by name needs no mount
cat >"$D/slurm.conf" <<END
ClusterName=tests
SlurmctldHost=ctl($net.1)
AuthType=auth/munge
AuthInfo=socket=$D/munge/socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool/%n
SlurmctldPidFile=$D/run/slurmctld.pid
SlurmdPidFile=$D/run/slurmd-%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=15
SlurmdTimeout=20
MinJobAge=3600
NodeName=DEFAULT CPUs=2 State=UNKNOWN
$(for i in $(seq $nodes); do echo "NodeName=node$i NodeAddr=$net.$((10 + i))"; done)
# a job in high requeues jobs in low, after a grace
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=30
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
END
export SLURM_CONF="$D/slurm.conf"
"$D/bin/on" ctl slurmctld -c
for i in $(seq $nodes); do
    mkdir "$D/spool/node$i"
    "$D/bin/on" "node$i" slurmd -N "node$i"
done
for _ in $(seq 60); do
    if [ "$(timeout 10 "$D/bin/sinfo" --noheader --Node --partition low --format %T | grep -c idle)" = $nodes ]; then
        trap - EXIT
        echo "$D"
        exit 0
    fi
    sleep 0.5
done
echo "error: Slurm did not come up within 30 s" >&2
exit 1
