"""Train with your own loop, which needs only `joint_loss`."""

import torch

from branchynet import joint_loss, zoo
from branchynet.data import load_data, loader


def main(epochs=5):
    torch.manual_seed(0)
    data = load_data("digits")
    net = zoo.b_lenet(branches="published")
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for epoch in range(1, epochs + 1):
        net.train()
        for images, labels in loader(data.train, 64, shuffle=True):
            optimizer.zero_grad()
            joint_loss(net(images), labels, loss_weights=(1.0, 0.3)).backward()
            optimizer.step()
        net.eval()
        with torch.no_grad():
            images, labels = data.val.images.float() / 255, data.val.labels
            right = [f"{(exit.argmax(1) == labels).float().mean():.1%}" for exit in net(images)]
        print(f"epoch {epoch}: right at each exit {right}")


if __name__ == "__main__":
    main()
