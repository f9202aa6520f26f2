"""Any torch network as a denoiser: trained here in seconds, sampled with a solver, steps and seed per sample, accelerated."""

import torch
from torch import nn

import fastdiff

MEANS = torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])  # the data: three clusters in the plane


class Net(nn.Module):
    """Predicts the noise in `[B, 2]` points at the times `[B]`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        angle = t[:, None] / 1000 * torch.pi / 2
        return self.layers(torch.cat([x, angle.sin(), angle.cos()], dim=1))


torch.manual_seed(0)
net, alphas = Net(), fastdiff.discrete_alphas("linear")  # of 1000 timesteps
optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
for _ in range(600):
    x = MEANS[torch.randint(3, (512,))] + 0.1 * torch.randn(512, 2)
    t, noise = torch.randint(1000, (512,)), torch.randn(512, 2)
    alpha = torch.as_tensor(alphas, dtype=torch.float32)[t][:, None]
    loss = (net(alpha.sqrt() * x + (1 - alpha).sqrt() * noise, t.float()) - noise).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

fastdiff.accelerate(net.eval())  # layer by layer, since nobody knows this network
sampler = fastdiff.Sampler(net, prediction="noise", process=fastdiff.VPDiscrete(alphas_cumprod=alphas))
solvers = ["dpmpp-2m", "unipc-2", "ddim"]
points = sampler.sample((300, 2), solver=solvers * 100, steps=[20, 12, 40] * 100, seed=list(range(300)))
distance = torch.cdist(points, MEANS).min(dim=1).values.view(100, 3)
for name, column in zip(solvers, distance.T, strict=True):
    print(f"{name}: {(column < 0.5).float().mean():.0%} of the samples lie in a cluster")
