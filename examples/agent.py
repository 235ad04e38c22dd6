"""An agent that learns from its user: `python examples/agent.py [http://host:port]`; needs `cortex up`."""

import asyncio
import sys

from streams import CortexClient

MEMORIES = {
    "blue-green": "Deployments to staging are blue-green: traffic moves after the checks pass.",
    "billing-owner": "Billing is owned by Noor; its database migrations run before the deployment.",
    "canteen": "The canteen closes at two.",
}


def call_llm(system: str, context: list[str], message: str) -> str:
    """Replace this by your model; it only shows its input."""
    return f"[{system}] With {len(context)} memories in mind, about {message!r}: first, {context[0]}"


async def main(url: str | None = None) -> None:
    async with CortexClient(url) as cortex:
        message = "How do I deploy billing to staging?"
        decision = await cortex.decide(message, conversation_id="chat-1", memories=MEMORIES)
        context = [memory.text or "" for memory in decision.memories]
        answer = call_llm(decision.strategy.prompt_framing, context, message)
        if decision.action == "escalate":
            answer += "\n(A colleague will look at this answer.)"
        print(answer)
        print(f"confidence {decision.confidence:.2f}, weights version {decision.weights_version}")
        await cortex.reply(decision, "Thanks, that worked!")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
