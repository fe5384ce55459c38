"""REINFORCE on any number of ranks: each plays games of its own, and all learn from all of them.

Run it alone, or by `horovodrun -np 2 python examples/policy_gradient.py`. The game: walk from the
middle of a line to its right end in few steps.
"""

import torch
from torch import nn

import hpctrain

GAMES, END, LIMIT = 64, 5, 40  # games a step, over all ranks
torch.manual_seed(0)
world = hpctrain.init()
policy = nn.Sequential(nn.Linear(2 * END + 1, 16), nn.Tanh(), nn.Linear(16, 2))
optimizer = hpctrain.strategy("auto", world).wrap(
    policy, torch.optim.Adam(policy.parameters(), lr=0.02)
)
random = torch.Generator().manual_seed(world.rank)  # other games on each rank
mine = len(range(world.rank, GAMES, world.size))


def play():
    """The log-probability of what was done in one game, and what it earned."""
    place, done = 0, torch.zeros(())
    for step in range(1, LIMIT + 1):
        at = nn.functional.one_hot(torch.tensor(place + END), 2 * END + 1).float()
        chances = policy(at).log_softmax(0)
        move = int(torch.multinomial(chances.exp(), 1, generator=random))
        done = done + chances[move]
        place = max(place + 2 * move - 1, -END)
        if place == END:
            return done, 1.0 - step / LIMIT
    return done, 0.0


for step in range(30):
    optimizer.zero_grad()
    chances, earned = zip(*(play() for _ in range(mine)), strict=True)
    earned = torch.tensor(earned)
    everybody = world.all_gather(earned)
    loss = -((earned - everybody.mean()) * torch.stack(chances)).sum() / GAMES
    (loss * world.size).backward()  # gradients are averaged over ranks; this loss is a sum
    optimizer.step()
    if world.rank == 0 and step % 10 == 9:
        print(f"step {step + 1}: a game earns {everybody.mean():.3f}")
